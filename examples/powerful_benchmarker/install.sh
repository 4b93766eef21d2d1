#!/usr/bin/env bash
# Installs powerful-benchmarker beside PML 2 into the active virtual environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
pip install -c ../../constraints.txt -r requirements.txt "../..[examples]"
# Its own requirements would bring PML 0.9.92 and faiss-gpu.
pip install --no-deps powerful-benchmarker==0.9.33
