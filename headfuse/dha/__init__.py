"""The paper's trained pipeline (DHA, arXiv 2406.06567)."""
