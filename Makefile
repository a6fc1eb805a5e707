# `make demo` and `make test` each build a virtual environment of their own, from pinned versions.
PYTHON ?= python3
VENVS ?= .venv

.PHONY: demo test lint clean

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

clean:
	rm -rf $(VENVS) build dist *.egg-info demo_output
