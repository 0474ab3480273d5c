PYTHON ?= python3
# Where the package index offers only CUDA builds of PyTorch for this platform, add the address of PyTorch's own
# CPU index (see pytorch.org, "Get started"): make install PIP_OPTIONS="--extra-index-url ADDRESS"
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install demo test fast-tests test-slow check format types docs bench lock viewer

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.11" if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_OPTIONS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(INSTALLED)

demo: install
	$(BIN)/anysite demo --output demo

test: format
	$(MAKE) --jobs=2 types fast-tests  # the checker of types takes one core and the better part of two minutes

fast-tests: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n 2 -m slow

check: format types

format: install
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs

types: install
	$(BIN)/pyright

docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pip install --quiet mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/python benchmarks/augment.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/predict_volume.py
	$(BIN)/python benchmarks/objective_step.py ram_dsir
	$(BIN)/python benchmarks/objective_step.py medcontext
	$(BIN)/python benchmarks/judge_overhead.py
	$(BIN)/python benchmarks/check.py
	$(BIN)/python benchmarks/predict_profile.py
	$(BIN)/python benchmarks/large_volume.py

# Resolve every dependency anew for all supported Python versions and platforms. CUDA packages are left out:
# with a CPU build of PyTorch nothing needs them, and a CUDA build is the user's own choice.
lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
		--extra development --extra dicom --extra itk --constraint requirements.pins pyproject.toml \
		| grep -vE '^(nvidia-|cuda-|triton|torch==)' > requirements.lock
	cat requirements.pins >> requirements.lock

# The 3-D viewer of the report as its makers publish it; needs npm. src/anysite/report/niivue/README.md keeps the digests.
NIIVUE ?= 0.69.0
VIEWER := src/anysite/report/niivue
viewer:
	rm -rf build/niivue && mkdir -p build/niivue
	cd build/niivue && npm pack --silent @niivue/niivue@$(NIIVUE) && tar -xzf niivue-niivue-$(NIIVUE).tgz
	gzip -9n < build/niivue/package/dist/niivue.umd.js > $(VIEWER)/niivue.umd.js.gz
	echo $(NIIVUE) > $(VIEWER)/VERSION
	sha256sum build/niivue/package/dist/niivue.umd.js
	openssl dgst -sha512 -binary build/niivue/niivue-niivue-$(NIIVUE).tgz | base64 -w0; echo
