# make demo   a fresh machine -> .venv -> pictures in out/demo
# make test   a fresh machine -> .venv -> the quick test suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
# The CPU build of torch is a tenth of the size of the default one on Linux. Its index is used where it answers.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo demo-bundle test test-all gpu sanitize lint eval clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(wildcard kernels/*.cuh kernels/cpu/*.h kernels/cpu/*.cpp)
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c "import urllib.request as u; u.urlopen('$(TORCH_INDEX)/torch/', timeout=3)" 2>/dev/null; \
	then set -x; $(BIN)/pip install -q --extra-index-url $(TORCH_INDEX) $(TORCH); \
	else set -x; $(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/lace-sample demo "smile & ~glasses & haircolor=blond" --count 16 --seed 0 --out out/demo --overwrite
	$(BIN)/lace-edit demo --seed 2 "smile" "yaw=0.7" "hat" "age=0.7" --out out/edit --overwrite
	@echo "Look at out/demo/grid.png and out/edit/strip.png"

test: setup
	$(BIN)/pytest -q

test-all: setup
	$(BIN)/pytest -q -m "not gpu"

# On a machine with a GPU, after pip install -e '.[gpu]' into the environment. See docs/gpu.md.
gpu: setup
	$(BIN)/pytest -q -m gpu -rs tests/test_gpu_*.py

# Every kernel under NVIDIA's checkers of memory, races and uninitialised reads.
sanitize: setup
	for tool in memcheck racecheck initcheck synccheck; do echo $$tool; \
	    compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest -q -m gpu -k "kernel and 3- or wgmma and tf32" \
	        tests/test_gpu_solve.py tests/test_gpu_kernels.py || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright

# The demo world from nothing: hours on a CPU; every step resumes or starts again on its own. See docs/training.md.
demo-bundle: setup
	for seed in 11 12 13; do \
	    $(BIN)/lace-train classifier --role labeller --seed $$seed --out runs/labeller-$$seed.safetensors; done
	$(BIN)/lace-train classifier --role judge --out runs/judge.safetensors
	$(BIN)/lace-train gan --data render:40000 --size 64 --pictures 800_000 --features runs/labeller-12.safetensors \
	    --out runs/gan
	$(BIN)/lace-train heads --gan runs/gan/generator.safetensors --samples 60_000 --noise 1 \
	    --labeller runs/labeller-11.safetensors runs/labeller-13.safetensors --epochs 12 --batch 256 --rate 3e-4 \
	    --out runs/heads
	$(BIN)/lace-train heads --gan runs/gan/generator.safetensors --samples 60_000 --attributes age yaw pitch light width \
	    --labeller runs/labeller-11.safetensors runs/labeller-13.safetensors --epochs 20 --batch 256 --rate 3e-4 \
	    --start runs/heads/*.safetensors --steered 24_576 --cache runs/heads/pairs --out runs/heads
	$(BIN)/lace-export --gan runs/gan/generator.safetensors --heads runs/heads/*.safetensors --name faces \
	    --guidance 2 --out runs/smooth.lace --overwrite
	$(BIN)/lace-train heads --bundle runs/smooth.lace --no-smooth --samples 200_000 --sought 60_000 --sharp-epochs 20 \
	    --labeller runs/labeller-11.safetensors runs/labeller-13.safetensors --out runs/sharp
	$(BIN)/lace-export --bundle runs/smooth.lace --add runs/sharp/*.sharp.safetensors --out runs/demo.lace --overwrite

# The numbers of the README: is the condition met, according to an image classifier that had no part in the training?
eval: setup
	$(BIN)/lace-eval demo --out out/eval

clean:
	rm -rf out $(VENV)
