# make demo    the main job on this machine: fleet, Envoy, controller, load; the before and after, live
# make cluster Kubernetes, Istio, a fleet and meshctl on this machine, until Ctrl-C
# make cluster-demo   the demo's before and after, through a real Istio; ARGS="--once --json" for one measurement
# make test    everything: lint, types, import rules, all tests, on the real Envoy, Prometheus, Triton, Kubernetes, Istio
# make check   the quick part of it: lint, types, import rules, unit and property tests
# make lock    pin the newest versions that pyproject.toml allows
# make crds    generate crds/ and docs/reference/api.md from the models
.PHONY: setup demo cluster cluster-demo test check lint lock crds clean
.DELETE_ON_ERROR:

BIN := .venv/bin
CODE := meshctl xds istio deviceplugin bench tests
WORKERS := 2
PYTEST := $(BIN)/pytest -q

setup:
	@scripts/setup.sh

demo: setup
	@$(BIN)/meshctl demo

cluster: setup
	@scripts/tools.sh prometheus etcd kubernetes istio >/dev/null
	@$(BIN)/python -m tests.cluster

cluster-demo: setup
	@scripts/tools.sh prometheus etcd kubernetes istio >/dev/null
	@$(BIN)/python -m tests.cluster.demo $(ARGS)

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check --quiet $(CODE)
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo >/dev/null || $(BIN)/lint-imports
	$(BIN)/python -m meshctl.api.crd --check

check: lint
	$(PYTEST) -n $(WORKERS) tests/unit tests/property

# One worker has the tests of the cluster that they share, which mostly wait, while the others do the rest. What measures
# has the machine for itself afterwards, also when something failed before.
test: lint
	@scripts/tools.sh >/dev/null
	@failed=; \
	$(PYTEST) -n $(WORKERS) --dist loadscope -m "not alone" tests || failed="the tests that run together"; \
	$(PYTEST) -m alone tests || failed="$${failed:+$$failed, and }those that run alone"; \
	[ -z "$$failed" ] || { echo "FAILED: $$failed: see above" >&2; exit 1; }

# uv in a throw-away environment: hashes for every platform's wheels, no download addresses
lock: setup
	$(BIN)/python -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --extra demo --group dev -o requirements.lock pyproject.toml
	rm -rf .venv-lock

crds: setup
	$(BIN)/python -m meshctl.api.crd

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
