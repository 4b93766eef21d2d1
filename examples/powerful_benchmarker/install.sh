#!/usr/bin/env bash
# Installs powerful-benchmarker beside PML 2 into the active virtual environment; PIP="uv pip" is faster than pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
${PIP:-pip} install -c ../../constraints.txt -r requirements.txt "../..[examples]"
# Its own requirements would bring PML 0.9.92 and faiss-gpu.
${PIP:-pip} install --no-deps powerful-benchmarker==0.9.33
