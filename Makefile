# Everything sets itself up in .venv: Python 3.10 or newer, make and a compiler are all it takes.
PYTHON ?= python3
# An exact version, so that nothing newer comes by itself. On Linux the package index has the CUDA
# build of several gigabytes; set PIP_EXTRA_INDEX_URL to PyTorch's CPU index to get the small one.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

KERNELS := src/aftermax/kernels
LIBRARY := $(KERNELS)/libaftermax.so
DOOR := $(wildcard tests/test_hf*.py)
NATIVE := CMakeLists.txt $(wildcard $(KERNELS)/cpu/*)

.PHONY: demo test test-all test-sanitize check kernels wheel bench bench-rows bench-attention bench-closeness bench-experts bench-hardware bench-in-context bench-linear bench-longvq bench-mqar bench-needle bench-output bench-recurformer bench-regression bench-sparsek bench-hf bench-trees docs figures clean

demo: .venv/lab.done      ## train six systems for some minutes, print the table, write the report
	$(BIN)/aftermax compare quick

test: check kernels .venv/transformers-4.done  ## lint, types, doctests and the suite
	$(BIN)/pytest -n auto -m "not slow"
	PYTHONPATH=.venv/transformers-4 $(BIN)/pytest -n auto -q $(DOOR)

test-all: check kernels .venv/transformers-4.done  ## the same with the long tests
	$(BIN)/pytest -n auto
	PYTHONPATH=.venv/transformers-4 $(BIN)/pytest -n auto -q $(DOOR)

test-sanitize: .venv/dev.done  ## the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DCMAKE_BUILD_TYPE=Debug -DAFTERMAX_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/python tests/sanitized.py build/sanitize

kernels: $(LIBRARY)       ## build the native library into the source tree

$(LIBRARY): $(NATIVE) | .venv/dev.done
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/native
	@touch $@

wheel: .venv/dev.done     ## build the platform wheel into dist/
	$(BIN)/python -m build --wheel

check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/lab.done     ## memory of the blocked reference against the whole matrix
	$(BIN)/python benchmarks/reference_memory.py

bench-rows: .venv/dev.done kernels  ## the row kernels against torch and the machine's bound
	$(BIN)/python benchmarks/rows.py

bench-attention: .venv/lab.done kernels  ## attention on the kernels against torch and the machine's multipliers
	$(BIN)/python benchmarks/attention.py

bench-closeness: .venv/lab.done  ## the theory of softmax regression: its proof by computer, slopes, bounds
	$(BIN)/python benchmarks/curvature.py
	$(BIN)/python benchmarks/closeness.py

bench-experts: .venv/lab.done kernels  ## a layer of experts against other walks, and what Edge-MoE's numbers cost
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/fixed_point.py

bench-hardware: .venv/lab.done .venv/hdl.done  ## the units as hardware: simulated bit for bit, cells counted by yosys
	$(BIN)/python benchmarks/hardware.py

bench-in-context: .venv/lab.done kernels  ## layers trained on regressions in context against gradient steps: an hour of one core
	$(BIN)/python benchmarks/in_context.py

bench-linear: .venv/lab.done kernels  ## the linear walk against chunk loops in torch, and against T
	$(BIN)/python benchmarks/linear.py

bench-longvq: .venv/lab.done kernels  ## what the codebook of LongVQ remembers, and what it costs
	$(BIN)/python benchmarks/longvq.py

bench-mqar: .venv/lab.done kernels  ## recall against the size of the state, one block for all mixers
	$(BIN)/python benchmarks/mqar.py

bench-needle: .venv/lab.done kernels  ## what SparseK learns to keep, against random scores and a window
	$(BIN)/python benchmarks/needle.py

bench-output: .venv/lab.done kernels  ## steps of output layers over the number of classes
	$(BIN)/python benchmarks/output.py
	$(BIN)/python benchmarks/soft_topk.py

bench-recurformer: .venv/lab.done .venv/hf.done kernels  ## which heads can be replaced: an hour of one core
	$(BIN)/python benchmarks/recurformer.py

bench-regression: .venv/lab.done  ## the solver of softmax regression against scipy's least_squares
	$(BIN)/python benchmarks/regression.py

bench-sparsek: .venv/lab.done kernels  ## selected keys against all of them, over T
	$(BIN)/python benchmarks/sparsek.py

bench-hf: .venv/lab.done .venv/hf.done kernels  ## a small Llama through the door against transformers' own attention
	$(BIN)/python benchmarks/hf.py

bench-trees: .venv/lab.done .venv/trees.done  ## label trees of others on the Debian sets: what a user would pick
	$(BIN)/python benchmarks/label_trees.py

figures: .venv/lab.done   ## redraw the figures and tables of README and docs from docs/results
	$(BIN)/python docs/make_figures.py

docs: .venv/docs.done
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/torch.done: .venv/bin/pip
	$(BIN)/pip install --quiet "$(TORCH)"
	@touch $@

# the oldest transformers that is supported, beside the newest
.venv/transformers-4.done: .venv/dev.done
	$(BIN)/pip install --quiet --target .venv/transformers-4 "transformers==4.57.*"
	@touch $@

.venv/%.done: .venv/torch.done pyproject.toml
	$(BIN)/pip install --quiet -e ".[$*]"
	@touch $@

clean:
	rm -rf .venv dist build docs/_build $(LIBRARY)
