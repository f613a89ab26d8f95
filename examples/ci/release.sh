#!/usr/bin/env bash
# Compress a release model, and refuse the result where it lost too much.
#
#     release.sh MODEL CALIBRATION_TEXT TEST_TEXT OUTPUT [options of `headfuse fuse`]
#
# GATES: limits, or a file of them (default: ci-gate). REPORTS: folder of report.html and junit.xml (default: reports).
# Exit code 0: OUTPUT is there. 3: a gate failed, and OUTPUT is not. Anything else: an error, and OUTPUT is not.
set -euo pipefail
model=$1 calibration=$2 test=$3 output=$4
shift 4
gates=${GATES:-ci-gate}
reports=${REPORTS:-reports}
candidate=$output.candidate

[ ! -e "$output" ] || { echo "$output: exists" >&2; exit 1; }
trap 'rm -rf "$candidate"' EXIT
mkdir -p "$reports"
headfuse fuse "$model" -o "$candidate" --data "$calibration" --overwrite "$@"
headfuse eval "$candidate" --verify --baseline "$model" --data "$test" \
    --samples "${SAMPLES:-24}" --sequence-length "${SEQUENCE_LENGTH:-512}" \
    --gate "$gates" --junit "$reports/junit.xml" --report "$reports/report.html" \
    ${GITHUB_STEP_SUMMARY:+--github-summary}
mv "$candidate" "$output"
