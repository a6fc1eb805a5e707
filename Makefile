# `make demo` and `make test` each build a virtual environment of their own, from pinned versions; `make test-newest` and
# `make test-lowest` from the newest and the lowest ones that setup.cfg allows. TESTS="-m core" runs the few tests of the core.
PYTHON ?= python3
VENVS ?= .venv
TESTS ?=
PROCESSES ?= 2
# A thread for each of them: with more threads than cores they wait for one another.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENVS)/$(1)/bin/python -m pytest -n $(PROCESSES) --dist loadfile $(TESTS)

.PHONY: demo test test-newest test-lowest lint wheel-check clean

demo: $(VENVS)/demo/installed
	$(VENVS)/demo/bin/python examples/demo.py --output_dir demo_output

test: $(VENVS)/test/installed
	$(call PYTEST,test)

test-newest test-lowest: test-%: $(VENVS)/%/installed
	$(call PYTEST,$*)

lint: $(VENVS)/test/installed
	$(VENVS)/test/bin/ruff check .
	$(VENVS)/test/bin/ruff format --check .
	$(VENVS)/test/bin/mypy ig_captioner

# torch first and alone: unconstrained, another package may ask for a build with several gigabytes of CUDA.
EXTRA = $*
CONSTRAINTS = constraints.txt
$(VENVS)/newest/installed $(VENVS)/lowest/installed: EXTRA = test
$(VENVS)/newest/installed: CONSTRAINTS = constraints-newest.txt
$(VENVS)/lowest/installed: CONSTRAINTS = constraints-lowest.txt
$(VENVS)/%/installed: setup.cfg constraints.txt constraints-newest.txt constraints-lowest.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRA)]"
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
