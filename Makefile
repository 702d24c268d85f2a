# make         sets up, prepares the quickstart's text, trains its model in about 3 minutes, prints samples
# make bert    the same for a masked model: trains it in about 3 minutes, prints what it fills a gap with
# make test    sets up and runs the tests; make test-slow runs the long ones
# make setup   creates .venv and installs what requirements.txt pins

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: quickstart bert ending setup test test-slow clean
quickstart: setup
	$(RUN) prepare.py config/quickstart.py
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py config/quickstart.py --prompt="def main(" --num_samples=3 --max_new_tokens=128
	@$(MAKE) -s ending RUN_DIR=out/quickstart GOAL=make

bert: setup
	$(RUN) prepare.py config/quickstart_bert.py
	$(RUN) train.py config/quickstart_bert.py
	$(RUN) sample.py --out_dir=out/quickstart_bert --prompt="for i in [MASK](10):"
	@$(MAKE) -s ending RUN_DIR=out/quickstart_bert GOAL="make bert"

ending:
	@echo "loss curves: $(RUN_DIR)/curves.png   checkpoints: $(RUN_DIR)/ckpt/"
	@[ -e $(RUN_DIR)/finished ] || \
	  echo "the model is unfinished, since this machine needs more than max_minutes; to train on: $(GOAL), again"

setup: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "error: $(PYTHON) is older than 3.11; name a newer one, as in: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv .venv || { \
	  echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu it comes with: apt install python3-venv"; exit 2; }
	.venv/bin/pip install -q -r requirements.txt
	@touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	@touch $@

test: .venv/installed-test
	$(RUN) -m pytest -q -n 2 --dist loadfile

test-slow: .venv/installed-test
	$(RUN) -m pytest -q -m slow

clean:
	rm -rf .venv data/quickstart out/quickstart out/quickstart_bert
