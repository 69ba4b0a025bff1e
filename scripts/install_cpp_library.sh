#!/usr/bin/env bash
# Makes a C++ library available to CMake: does nothing when it is there, else installs the distribution's package.
# Usage: install_cpp_library.sh <CMake package> <distribution's package> [sudo command ...]
set -eu
cmake_package=$1
apt_package=$2
shift 2
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
cat > "$probe/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.24)
project(probe CXX)
find_package($cmake_package REQUIRED)
CMAKE
cmake_bin=$(dirname "$0")/../.venv/bin/cmake
if "$cmake_bin" -S "$probe" -B "$probe/build" >/dev/null 2>&1; then
  exit 0
fi
echo "CMake did not find $cmake_package; installing $apt_package with apt-get."
if "$@" apt-get update -q >/dev/null 2>&1 && "$@" apt-get install -y -q "$apt_package" >/dev/null 2>&1; then
  exit 0
fi
echo "$cmake_package is missing and could not be installed without root." >&2
echo "Install it with:  sudo apt-get install $apt_package" >&2
exit 1
