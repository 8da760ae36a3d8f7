"""What installing the agents says where it cannot; nothing is installed here."""

from __future__ import annotations

import json

import pytest
from equipoise.tests.agents import install
from equipoise.tests.agents.install import CannotInstall


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    monkeypatch.setattr(install, "NPM_FOLDER", tmp_path / "npm")
    return tmp_path


def _executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_what_is_missing_is_named_with_the_package_that_has_it(folder, monkeypatch):
    tools = folder / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(CannotInstall, match="node is missing: install Debian's packages nodejs and npm"):
        install.install_npm_agents()
    _executable(tools / "node", "echo v18.19.0")
    with pytest.raises(CannotInstall, match="npm is missing"):
        install.install_npm_agents()
    _executable(tools / "npm", "echo registry: no such host >&2; exit 1")
    with pytest.raises(CannotInstall, match=r"node 18\.19\.0 is too old: 20 or newer"):
        install.install_npm_agents()
    _executable(tools / "node", "echo v20.1.0")
    with pytest.raises(CannotInstall, match=r"`npm install --no-audit` failed: registry: no such host"):
        install.install_npm_agents()
    assert not (folder / "npm" / ".installed.json").exists()


def test_what_is_there_is_not_installed_again(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    for name, versions in (("npm", install.NPM_PACKAGES), ("mini", install.MINI_PACKAGES)):
        (folder / name).mkdir()
        (folder / name / ".installed.json").write_text(json.dumps(versions))
    assert install.install_npm_agents() == folder / "npm"
    assert install.install_mini() == folder / "mini"
