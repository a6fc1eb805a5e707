# `make demo` and `make test` each build a virtual environment of their own, from pinned versions.
PYTHON ?= python3
VENVS ?= .venv

.PHONY: demo test lint wheel-check clean

demo: $(VENVS)/demo/installed
	$(VENVS)/demo/bin/python examples/demo.py --output_dir demo_output

test: $(VENVS)/test/installed
	$(VENVS)/test/bin/python -m pytest

lint: $(VENVS)/test/installed
	$(VENVS)/test/bin/ruff check .
	$(VENVS)/test/bin/ruff format --check .
	$(VENVS)/test/bin/mypy ig_captioner

# torch first and alone: unconstrained, another package may ask for a build with several gigabytes of CUDA.
$(VENVS)/%/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# The wheel of a clean clone, in an empty environment outside the checkout, with what it asks for.
wheel-check:
	set -e; here=$$PWD; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	git clone --quiet . "$$folder/clone"; \
	cd "$$folder"; $(PYTHON) -m venv venv; \
	venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir . ./clone; \
	venv/bin/python -m pip install --quiet --constraint "$$here/constraints.txt" torch; \
	venv/bin/python -m pip install --quiet --constraint "$$here/constraints.txt" ./*.whl; \
	cp clone/docs/images/demo.png .; rm -rf clone; \
	venv/bin/ig-captioner classify demo.png --labels cat dog horse

clean:
	rm -rf $(VENVS) build dist *.egg-info demo_output
