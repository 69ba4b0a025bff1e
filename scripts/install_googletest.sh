#!/usr/bin/env bash
# Makes GoogleTest available to CMake: does nothing when it is there, else installs the distribution's package.
# Usage: install_googletest.sh [sudo command ...]
set -eu
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
cat > "$probe/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.24)
project(probe CXX)
find_package(GTest REQUIRED)
CMAKE
cmake_bin=$(dirname "$0")/../.venv/bin/cmake
if "$cmake_bin" -S "$probe" -B "$probe/build" >/dev/null 2>&1; then
  exit 0
fi
echo "GoogleTest was not found; installing libgtest-dev with apt-get."
if "$@" apt-get update -q >/dev/null 2>&1 && "$@" apt-get install -y -q libgtest-dev >/dev/null 2>&1; then
  exit 0
fi
echo "GoogleTest is missing and could not be installed without root." >&2
echo "Install it with:  sudo apt-get install libgtest-dev" >&2
exit 1
