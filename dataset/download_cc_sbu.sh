#!/usr/bin/env bash
# Downloads the pictures of ccs_synthetic_filtered_large.tsv into tar shards, with img2dataset (pip install img2dataset).
set -euo pipefail

# shellcheck source=dataset/download_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/download_table.sh"
download_table cc_sbu cc_sbu/ccs_synthetic_filtered_large.tsv cc_sbu/cc_sbu_dataset "$@"
