#!/usr/bin/env bash
# Fetch MS MARCO passage ranking: resume, check md5, unpack, count lines; what is there already is skipped.
#
#   bash scripts/download.sh                                                      # everything run_colbert.sh needs
#   bash scripts/download.sh FOLDER ARCHIVE...                                    # other folder, only these archives
#   bash scripts/download.sh data/msmarco qidpidtriples.train.full.2.tsv.gz       # triples of ids
#
# Takes 9.7 GB of downloads and 33 GB unpacked; the .tar.gz may be deleted afterwards.
# MSMARCO_URL and MSMARCO_MANIFEST replace the server and scripts/msmarco.manifest (archive, md5, member, lines).
set -euo pipefail

fail() { echo "download.sh: error: $*" >&2; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
url=${MSMARCO_URL:-https://msmarco.z22.web.core.windows.net/msmarcoranking}
manifest=${MSMARCO_MANIFEST:-$root/scripts/msmarco.manifest}
folder=${1:-$root/data/msmarco}
archives=("${@:2}")
[ ${#archives[@]} -gt 0 ] || archives=(collectionandqueries.tar.gz triples.train.small.tar.gz top1000.dev.tar.gz)

[ -f "$manifest" ] || fail "$manifest: no such manifest"
for tool in curl tar md5sum; do command -v "$tool" > /dev/null || fail "$tool is not installed"; done
mkdir -p "$folder"
temporary=
trap '[ -z "$temporary" ] || rm -rf "$temporary"' EXIT

md5_of() { md5sum < "$1" | cut -d ' ' -f 1; }

# Fetch $1 into the folder, unless it is there; under its own name it is whole and has md5 $2.
fetch() {
    local file=$folder/$1 partial=$folder/$1.partial
    if [ -f "$file" ]; then
        [ "$(md5_of "$file")" = "$2" ] || fail "$file: md5 is not $2: delete it and run this again"
        echo "$1: already downloaded"
        return
    fi
    echo "$1: downloading from $url"
    # Without this header Azure answers by an old protocol, which does not resume.
    curl --fail --show-error --location --retry 5 --retry-delay 2 --header 'X-Ms-Version: 2019-12-12' \
        --continue-at - --output "$partial" "$url/$1" ||
        fail "$url/$1: curl stopped with code $?: run this again to resume; if that does not help, delete $partial"
    local md5
    md5=$(md5_of "$partial")
    if [ "$md5" != "$2" ]; then
        rm "$partial"
        fail "$url/$1: md5 is $md5, expected $2; the file was deleted: run this again"
    fi
    mv "$partial" "$file"
}

# Unpack the members of $1 that the manifest lists; each takes its own name once all have been counted.
unpack() {
    local member lines found
    temporary=$folder/$1.unpacking
    rm -rf "$temporary"
    mkdir "$temporary"
    echo "$1: unpacking"
    tar -xzf "$folder/$1" -C "$temporary" || fail "$folder/$1: tar cannot unpack it (is the disk full?)"
    while read -r member lines; do
        [ -f "$temporary/$member" ] || fail "$folder/$1: has no $member"
        found=$(wc -l < "$temporary/$member")
        [ "$found" -eq "$lines" ] || fail "$folder/$1: $member has $found lines, expected $lines"
        echo "$member: $found lines"
    done < <(members "$1")
    while read -r member lines; do mv "$temporary/$member" "$folder/$member"; done < <(members "$1")
    rm -rf "$temporary"
}

members() { awk -v archive="$1" '$1 == archive && $3 != "-" { print $3, $4 }' "$manifest"; }

is_unpacked() {
    local member lines
    while read -r member lines; do [ -f "$folder/$member" ] || return 1; done < <(members "$1")
}

for archive in "${archives[@]}"; do
    md5=$(awk -v archive="$archive" '$1 == archive { print $2; exit }' "$manifest")
    [ -n "$md5" ] || fail "$archive: not in $manifest"
    if [ -z "$(members "$archive")" ]; then
        fetch "$archive" "$md5"
    elif is_unpacked "$archive"; then
        echo "$archive: already unpacked, skipped"
    else
        fetch "$archive" "$md5"
        unpack "$archive"
    fi
done
echo "$folder: ready"
