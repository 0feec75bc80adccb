#!/usr/bin/env bash
# Downloads the pictures of laion_synthetic_filtered_large.tsv into tar shards, with img2dataset (pip install img2dataset).
set -euo pipefail

# shellcheck source=dataset/download_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/download_table.sh"
download_table laion laion/laion_synthetic_filtered_large.tsv laion/laion_dataset "$@"
