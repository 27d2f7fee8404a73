#!/usr/bin/env bash
# Runs every libFuzzer target of tests/fuzz for a while, under the address and undefined sanitizers.
#
#   scripts/fuzz.sh [SECONDS]    a target, 30 by default
#
# What was found interesting is kept in build/fuzz and where the next run begins; an input that breaks something
# is written there and named. Needs clang.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-30}
out=build/fuzz
mkdir -p "$out"
flags="-std=c11 -D_GNU_SOURCE -O1 -g -pthread -fno-omit-frame-pointer -fno-sanitize-recover=all"
libs="$(pkg-config --cflags --libs libxxhash libzstd liburing) -ldl -lm"

for source in tests/fuzz/fuzz_*.c; do
	name=$(basename "$source" .c)
	echo "== $name, $seconds s"
	# shellcheck disable=SC2086
	clang $flags -Icsrc -fsanitize=fuzzer,address,undefined csrc/{base,plat,core}/*.c "$source" \
		-o "$out/$name" $libs
	mkdir -p "$out/$name.corpus"
	"$out/$name" -max_total_time="$seconds" -max_len=65536 -timeout=30 -print_final_stats=1 \
		-artifact_prefix="$out/$name." "$out/$name.corpus"
done
