"""The code of the README, and of the pages on serving and on Hugging Face, runs as a test."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=[
        "README.md",
        "docs/serving.md",
        "docs/huggingface.md",
        "docs/huggingface_examples.md",
    ],
).pytest()
