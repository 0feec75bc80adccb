"""BLIP's captions of LAION: laion_synthetic_filtered_large.json -> the table that img2dataset reads.

    python dataset/convert_laion.py laion/laion_synthetic_filtered_large.json \\
        --out laion/laion_synthetic_filtered_large.tsv

The table has the columns url and caption; dataset/download_laion.sh downloads what it names.
"""

from __future__ import annotations

from collections.abc import Sequence

import caption_table

NAME = "laion_synthetic_filtered_large"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    caption_table.main(__doc__ or "", f"{NAME}.json", f"{NAME}.tsv", argv)


if __name__ == "__main__":
    main()
