#!/usr/bin/env bash
# Sourced by download_laion.sh and download_cc_sbu.sh: the pictures of a table into tar shards, with img2dataset.

usage() {
    cat <<TEXT
usage: dataset/download_$set.sh [TABLE [FOLDER]] [--image-size 224|256] [--processes N] [--threads N]

TABLE      what dataset/convert_$set.py wrote (default: $default_table)
FOLDER     where shards 00000.tar, 00001.tar, ... go (default: $default_folder)

--image-size   side of the square that pictures are fitted into (default: 224)
--processes    processes side by side (default: 16)
--threads      downloads side by side in each process (default: 128)

A second call goes on with the shards that are missing.
TEXT
}

fail() {
    echo "download_$set.sh: $1" >&2
    exit 2
}

# download_table SET DEFAULT_TABLE DEFAULT_FOLDER [ARGUMENT...]
download_table() {
    local set=$1 default_table=$2 default_folder=$3
    shift 3
    local image_size=224 processes=16 threads=128 name places=()
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --image-size | --processes | --threads)
                [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number"
                name=${1#--}
                printf -v "${name//-/_}" '%s' "$2"
                shift 2
                ;;
            -*) fail "unknown option $1; --help lists them" ;;
            *) places+=("$1") && shift ;;
        esac
    done
    [ ${#places[@]} -le 2 ] || fail "expected TABLE and FOLDER, found ${places[*]}"
    local table=${places[0]:-$default_table} folder=${places[1]:-$default_folder}

    [ -f "$table" ] || fail "'$table' not found; make it with: python dataset/convert_$set.py"
    command -v img2dataset > /dev/null || fail "img2dataset not found; pip install img2dataset (best in an environment of its own)"
    [ "$image_size" = 224 ] || [ "$image_size" = 256 ] || fail "--image-size: found $image_size, allowed: 224, 256"

    mkdir -p "$folder"
    exec img2dataset \
        --url_list "$table" --input_format tsv --url_col url --caption_col caption \
        --output_folder "$folder" --output_format webdataset \
        --image_size "$image_size" --processes_count "$processes" --thread_count "$threads" \
        --incremental_mode incremental
}
