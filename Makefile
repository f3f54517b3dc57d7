PYTHON ?= python3
RUN = .venv/bin/python
# Two halves that run side by side, of about the same length.
ONE_HALF = tests/kernels tests/e2e/test_commands.py
OTHER_HALF = $(ONE_HALF:%=--ignore %)

.PHONY: demo serve test lint quality needle-model bench bench-smoke chaos soak setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         start a server, hold chats whose pages are evicted and recalled, check every answer"
	@echo "make serve        start a server and keep it up"
	@echo "make test         lint and the whole suite"
	@echo "make lint         ruff, mypy"
	@echo "make quality      what a budget costs in answers, against full attention and rules that drop"
	@echo "make needle-model train the model that demo and quality use, about 20 minutes"
	@echo "make bench        stock SGLang and arkvale in turn, all of docs/performance.md, under half an hour"
	@echo "make bench-smoke  a part of it, about 5 minutes, written under build/bench"
	@echo "make chaos        100,000 random events on the cache and on servers"
	@echo "make soak         an hour of constant load: does memory, a file handle or step time grow?"

setup:
	@$(PYTHON) setup_env.py

demo: setup
	@$(RUN) examples/demo.py

serve: setup
	@$(RUN) examples/serve.py

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# Tests and chaos: one thread a process.  Threads that wait for each other in every op are slower than
# one where two processes share two cores.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

test: setup lint
	@$(PYTHON) setup_env.py --release all
	@log=$$(mktemp); export $(ONE_THREAD); \
	$(RUN) -m pytest $(ONE_HALF) >$$log 2>&1 & half=$$!; \
	$(RUN) -m pytest $(OTHER_HALF); other=$$?; \
	wait $$half; half=$$?; cat $$log; rm -f $$log; exit $$((half + other))

quality: setup
	@PYTHONPATH=examples:benchmarks $(RUN) -m quality $(ARGS)

needle-model: setup
	@PYTHONPATH=examples $(RUN) -m needle_model.train $(ARGS)

bench: setup
	@PYTHONPATH=examples:benchmarks $(RUN) -m bench $(ARGS)

bench-smoke: ARGS = --quick
bench-smoke: bench

soak: setup
	@PYTHONPATH=examples:benchmarks $(RUN) -m soak $(ARGS)

chaos: setup
	@PYTHONPATH=examples:tests $(ONE_THREAD) $(RUN) -m chaos $(ARGS)

clean:
	rm -rf .venv .venv-* build *.egg-info
