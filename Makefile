# make setup   an environment in .venv with the command .venv/bin/k2
# make demo    the whole way on photographs that installed packages ship; ends with the place of the report
# make test    all tests;  make lint  style
#
# K2_DEPS=DIR keeps the installed dependencies in DIR, outside the clone, so that several clones share them (.ci/run does).

PYTHON ?= python3
VENV := .venv
RUN ?= demo-run
SITE = $$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: setup demo test lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"'
	$(PYTHON) -m venv $(VENV)
ifdef K2_DEPS
	test -e $(K2_DEPS)/.whole || { rm -rf $(K2_DEPS) && $(PYTHON) -m venv $(K2_DEPS) \
	  && $(K2_DEPS)/bin/pip install -qq -c constraints.txt '.[train,dev]' \
	  && $(K2_DEPS)/bin/pip uninstall -q -y k2-data-engine && touch $(K2_DEPS)/.whole; }
	$(K2_DEPS)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $(SITE)/k2_deps.pth
	$(VENV)/bin/pip install -qq --no-deps -e .
else
	$(VENV)/bin/pip install -qq -c constraints.txt -e '.[train,dev]'
endif
	touch $@

demo: setup
	$(VENV)/bin/k2 demo --out $(RUN)

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV) $(RUN)
