"""What a wheel holds: an editable install shows whole folders and would hide what `pyproject.toml` forgot."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    found = {
        ".".join([package, *init.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for init in folder.rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found
    code = {path.parent for folder in FOLDERS.values() for path in folder.rglob("*.py") if folder.name != "recipes"}
    assert all((folder / "__init__.py").exists() for folder in code)


def test_every_template_and_recipe_is_data_of_the_wheel() -> None:
    patterns = [
        (FOLDERS[".".join(package.split(".")[:2])].joinpath(*package.split(".")[2:]), pattern)
        for package, names in SETUPTOOLS["package-data"].items()
        for pattern in names
    ]
    for root in FOLDERS.values():
        for path in root.rglob("*"):
            if path.suffix in {".yaml", ".json", ".safetensors", ".jinja", ".txt", ".j2", ".css", ".js", ".sbatch"}:
                assert any(
                    path.is_relative_to(folder) and fnmatch(str(path.relative_to(folder)), pattern.replace("**/", "*"))
                    for folder, pattern in patterns
                ), path
