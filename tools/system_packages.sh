#!/usr/bin/env bash
# Install the one system package that mome_dist likes to have: flite, the main synthesiser of the synthetic corpus.
# Never fails: without flite the corpus generator uses the PyPI package espeakng-loader (extra `espeak`), without root.
set -euo pipefail

if command -v flite >/dev/null; then
    exit 0
fi

fall_back() {
    echo "note: flite is not installed ($1); the synthetic corpus will be spoken by espeakng-loader instead" >&2
    exit 0
}

command -v apt-get >/dev/null || fall_back "this system has no apt-get"
[[ "$(id -u)" -eq 0 ]] || fall_back "it needs root: sudo apt-get install flite"

export DEBIAN_FRONTEND=noninteractive
install_flite() { apt-get install --yes --no-install-recommends flite; }
# A fresh machine has no package lists yet, so a first failure is followed by an update.
install_flite || { apt-get update && install_flite; } || fall_back "apt-get could not install it"
