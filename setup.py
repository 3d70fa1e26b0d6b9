"""Hands what settings.ini says to setuptools; everything else is in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
suffix = "_requirements"
extras = {key.removesuffix(suffix): settings[key].split() for key in settings if key.endswith(suffix)}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=[*find_packages(include=["chunk_grpo_nb", "chunk_grpo_nb.*"]), "chunk_grpo_nb.data"],
    package_dir={"chunk_grpo_nb.data": "data"},  # the embedded models travel with the library
    package_data={
        "chunk_grpo_nb": ["py.typed"],
        "chunk_grpo_nb.data": ["shapes/*", "shapes/*/*", "prompts/*"],
    },
    install_requires=settings["requirements"].split(),
    extras_require=extras,
)
