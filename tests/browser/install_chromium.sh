#!/bin/sh
# The browser tests need a Chromium. Installs Debian's when none is there and this user may; says so otherwise.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing chromium for the browser tests."
    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "No Chromium found, and it could not be installed: the browser tests will be skipped. Install one with: sudo apt-get install chromium"
exit 0
