"""The code of the README, and of the pages on serving, on Hugging Face, on RecurFormer, on LongVQ,
on softmax regression and on experts, runs as a test."""

from sybil import Document, Example, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.typing import Evaluator


class Page(Document):
    """Its examples read on from one another, and each may be given to another process: what stands
    before one runs first."""

    def __init__(self, text: str, path: str):
        super().__init__(text, path)
        self.ran = 0
        """Where the last example that ran ends."""

    def evaluate(self, example: Example, evaluator: Evaluator) -> None:
        for earlier in self.examples():
            if self.ran <= earlier.start < example.start:
                super().evaluate(earlier, earlier.region.evaluator)
                self.ran = earlier.end
        super().evaluate(example, evaluator)
        self.ran = max(self.ran, example.end)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=[
        "README.md",
        "docs/serving.md",
        "docs/fixed_memory.md",
        "docs/sparsek.md",
        "docs/longvq.md",
        "docs/recurformer.md",
        "docs/regression.md",
        "docs/regression_theory.md",
        "docs/experts.md",
        "docs/huggingface.md",
        "docs/huggingface_examples.md",
    ],
    document_types={".md": Page},
).pytest()
