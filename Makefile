# make         sets up, prepares the quickstart's text, trains its model in about 3 minutes, prints samples
# make bert    the same for a masked model, in about 3 minutes; prints its guesses for a gap
# make test    sets up and runs the tests; make test-slow runs the long ones
# make setup   creates .venv and installs what requirements.txt pins

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: quickstart bert setup test test-slow clean
quickstart: setup
	$(RUN) prepare.py config/quickstart.py
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py config/quickstart.py --prompt="def main(" --num_samples=3 --max_new_tokens=128
	@$(call last_line,quickstart)

bert: setup
	$(RUN) prepare.py config/quickstart_bert.py
	$(RUN) train.py config/quickstart_bert.py
	$(RUN) sample.py --out_dir=out/quickstart_bert --prompt="for i in [MASK](10):"
	@$(call last_line,quickstart_bert)

# train.py writes the file `finished`; without it, max_minutes has ended the run early
last_line = test -e out/$(1)/finished \
  && echo "loss curves: out/$(1)/curves.png   checkpoints: out/$(1)/ckpt/" \
  || echo "the model is unfinished: training stopped after the preset's max_minutes; make $@ continues it"

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

TWO_WORKERS = -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-test
	$(RUN) -m pytest -q $(TWO_WORKERS)

test-slow: .venv/installed-test
	$(RUN) -m pytest -q -m "slow and not alone" $(TWO_WORKERS)
	$(RUN) -m pytest -q -m "slow and alone"

clean:
	rm -rf .venv data/quickstart out/quickstart out/quickstart_bert
