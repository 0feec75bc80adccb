"""BLIP's captions of Conceptual Captions and SBU: their JSON list -> the table that img2dataset reads.

    python dataset/convert_cc_sbu.py cc_sbu/ccs_synthetic_filtered_large.json \\
        --out cc_sbu/ccs_synthetic_filtered_large.tsv

The table has the columns url and caption; dataset/download_cc_sbu.sh downloads what it names.
"""

from __future__ import annotations

from collections.abc import Sequence

import caption_table

NAME = "ccs_synthetic_filtered_large"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    caption_table.main(__doc__ or "", f"{NAME}.json", f"{NAME}.tsv", argv)


if __name__ == "__main__":
    main()
