# make demo: adapt a model on real photographs.   make test: every test a CPU can run.   make help: the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two processes of one thread each: two OpenMP threads of one process spend their time waiting for each other
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile
STAMP  := $(VENV)/.installed
# the demo has an environment of its own, with what the package needs to run; one of `make install` is used if it is there
DEMO_VENV  ?= .venv-demo
DEMO_STAMP := $(DEMO_VENV)/.installed
TORCH_CPU  ?= https://download.pytorch.org/whl/cpu
# runs a command and says every two seconds that it still runs: pip unpacks gigabytes without a word
ticking = @( s=0; while sleep 2 && kill -0 $$$$ 2>/dev/null; do s=$$((s + 2)); echo "demo: installing, $$s s so far"; done ) & \
	tick=$$!; $(1); code=$$?; kill $$tick; exit $$code
CODE   := upstep_fast kernels bench

.DEFAULT_GOAL := help
.PHONY: help install gpu-install demo test test-interp test-aot test-aot-older test-gpu gpu-first gpu-rehearsal gpu-wheels sanitize long check format bench bench-gpu bench-compare figures docs clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

install: $(STAMP)  ## make .venv and install the package with its tools

# dependencies first, then the package without build isolation: the compiled ops need the torch that is installed
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools cmake ninja pybind11
	$(BIN)/pip install --quiet torch timm
	# these pin versions of each other (fsspec, botocore): among all others pip tries them out for ever, alone for seconds
	$(BIN)/pip install --quiet 'datasets>=3' 's3fs>=2024.6' 'moto[server]>=5'
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

# run-time dependencies only. Without an NVIDIA GPU torch is the one without NVIDIA's libraries (3 GB), where its index answers
$(DEMO_STAMP): pyproject.toml setup.py
	@echo "demo: installing what the package needs to run in $(DEMO_VENV)"
	$(call ticking,test -d $(DEMO_VENV) || $(PYTHON) -m venv $(DEMO_VENV))
	$(call ticking,if [ "$$(uname)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then echo "demo: torch from PyPI"; \
	elif $(DEMO_VENV)/bin/python -c "import urllib.request as r; r.urlopen('$(TORCH_CPU)/torch/', timeout=5)" 2>/dev/null; then \
	  echo "demo: no NVIDIA GPU here: torch for CPUs from $(TORCH_CPU)"; \
	  $(DEMO_VENV)/bin/pip install 'torch>=2.11' torchvision --index-url $(TORCH_CPU) || echo "demo: failed; torch from PyPI"; \
	else echo "demo: $(TORCH_CPU) does not answer: torch from PyPI with NVIDIA's libraries"; fi)
	$(call ticking,$(DEMO_VENV)/bin/pip install 'setuptools>=77')
	$(call ticking,UPSTEP_FAST_NATIVE=none $(DEMO_VENV)/bin/pip install --no-build-isolation -e .)
	touch $@

demo: $(if $(wildcard $(STAMP)),,$(DEMO_STAMP))  ## adapt a small model to hand-sign photographs, without labels (minutes on 2 cores)
	$(if $(wildcard $(STAMP)),$(BIN),$(DEMO_VENV)/bin)/upstep-fast demo

test: install    ## every test a CPU can run: unit, interpreter, ahead-of-time compiles
	$(PYTEST) -m "not gpu and not long and not interp"
	TRITON_INTERPRET=1 $(PYTEST) -m "interp and not long"

test-interp: install  ## the Triton kernels in the CPU interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m "interp and not long"

test-aot: install  ## compile the Triton kernels for sm_80, sm_90 and sm_100
	$(PYTEST) -m "aot and not long"

# the Triton that torch 2.11 comes with, the oldest torch that the package takes, in an environment of its own
OLDER ?= .venv-older
$(OLDER)/.installed: tests/kernels/aot/older.txt
	test -d $(OLDER) || $(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/pip install --quiet --extra-index-url $(TORCH_CPU) -r $<
	touch $@

test-aot-older: $(OLDER)/.installed  ## the same with torch 2.11 and Triton 3.6, every form
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OLDER)/bin/pytest -n $(JOBS) -m aot tests/kernels/test_aot.py

# the GPU targets use the python that is active, where torch sees the GPU; nothing is downloaded
gpu-install:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .

# a process each: an illegal memory access or a hang then costs one of them, not the rest
test-gpu: gpu-install  ## the tests that need a GPU, with the python that is active
	$(PYTHON) -m pytest -m gpu $$($(PYTHON) bench/gpu/tasks.py)

# packages that a GPU machine without a network may lack; gpu-first installs what lies there
gpu-wheels: install  ## download small packages to carry to a GPU machine that has torch, timm, peft and pytest
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --dest build/gpu-wheels \
	  rich markdown-it-py mdurl pygments tyro docstring-parser typeguard pytest-timeout pytest-xdist execnet \
	  pytest-benchmark py-cpuinfo

gpu-first:       ## build, check and time everything on a GPU in nine minutes, with the python that is active
	$(PYTHON) bench/gpu/first.py --out bench/results

gpu-rehearsal: install  ## the same commands on the CPU, small shapes, and four planted faults
	$(BIN)/python bench/gpu/first.py --out build/gpu-rehearsal --device cpu --plant --limit 1800 --patience 3

NATIVE_BUILD = build/sanitize
OPS = attention gelu layer_norm lora_linear lora_linear_fp8 patchify quantize scored_sinkhorn sinkhorn swapped_loss views
sanitize:        ## compute-sanitizer's four tools on the CUDA kernels, two on the Triton kernels (needs a GPU)
	cmake -S . -B $(NATIVE_BUILD) -G Ninja -DUPSTEP_FAST_CUDA=ON \
	  -DTORCH_FOLDER=$$($(PYTHON) -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])") \
	  -Dpybind11_ROOT=$$($(PYTHON) -m pybind11 --cmakedir)
	cmake --build $(NATIVE_BUILD) --target test_kernels
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(NATIVE_BUILD)/test_kernels || exit 1; done
	for tool in memcheck racecheck; do for op in $(OPS); do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) bench/gpu/facts.py check $$op cuda triton || exit 1; \
	  done; done

long: install test-aot-older  ## the long forms of the tests (hours)
	$(PYTEST) -m "long and not gpu and not interp"
	TRITON_INTERPRET=1 $(PYTEST) -m "interp and long"

check: install   ## format, lint, spelling, types, layers, lengths
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/lizard --length 40 --CCN 1000 --warnings_only $(CODE)
	! find $(CODE) -name '*.py' | xargs wc -l | awk '$$1 > 300 && $$2 != "total" {print $$2 ": " $$1 " lines, at most 300"}' | grep .

format: install  ## apply the formatter and the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install   ## the benchmarks, small shapes on a CPU
	$(BIN)/pytest bench --benchmark-only --benchmark-json=bench/results/local.json

bench-gpu: gpu-install  ## the benchmarks on the GPU of this machine, with the python that is active
	pytest bench --benchmark-only --benchmark-json=bench/results/gpu.json
	$(PYTHON) bench/engine/sweep.py --json bench/results/sweep_gpu.json

bench-compare: install  ## the last `make bench` against the stored run
	$(BIN)/pytest-benchmark compare bench/results/pytest_cpu2.json bench/results/local.json --group-by=fullname --columns=min,median

figures: install ## run the fault tests and fill bench/results/reliability_figures.md (LONG=--long: the long forms too)
	$(BIN)/python bench/reliability/figures.py $(LONG)

docs: install    ## build site/ from docs/; a broken link, anchor or reference ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

clean:           ## remove what make made
	rm -rf $(VENV) $(DEMO_VENV) $(OLDER) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
