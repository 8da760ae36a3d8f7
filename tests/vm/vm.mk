# The second kernel under test; included by the Makefile. VM_KERNEL=, VM_MEMORY= and VM_LIMIT_S= are read from the environment.
.PHONY: vm vm-shell vm-test vm-packages
VM := $(PY) -m equipoise.tests.vm

vm: venv ## run CMD="..." as root in the test VM
	@test -n "$$CMD" || { echo 'make vm needs a command: make vm CMD="uname -a"'; exit 2; }
	@$(VM) run -- bash -c "$$CMD"

vm-shell: venv ## a root shell in the test VM
	@$(VM) shell

vm-test: venv proto ebpf ## the tests that run in the test VM
	EQUIPOISE_REQUIRE_VM=1 $(PYTEST) tests/vm -q

vm-packages: venv ## fetch what the test VM is made of
	@$(VM) packages
