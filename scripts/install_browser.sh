#!/usr/bin/env bash
# Makes headless Chromium and its driver available to the tests of the operator page: does nothing when they are there,
# else installs the distribution's packages.
# Usage: install_browser.sh [sudo command ...]
set -eu
has_browser() {
  for browser in chromium chromium-browser google-chrome chrome; do
    if command -v "$browser" >/dev/null && command -v chromedriver >/dev/null; then
      return 0
    fi
  done
  return 1
}
if has_browser; then
  exit 0
fi
packages="chromium chromium-driver"
echo "Chromium or chromedriver is missing; installing $packages with apt-get."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
if "$@" apt-get update -q >"$log" 2>&1 &&
  "$@" apt-get install -y -q --no-install-recommends $packages >>"$log" 2>&1 && has_browser; then
  exit 0
fi
tail -n 3 "$log" >&2
echo "The tests of the operator page need Chromium and chromedriver, which could not be installed." >&2
echo "Install them with:  sudo apt-get install $packages  (Debian; elsewhere any Chrome with its chromedriver)" >&2
exit 1
