"""What the offline task takes from lmms-eval's ChartQA; a row may hold several images."""

from lmms_eval.tasks.chartqa.utils import chartqa_doc_to_text, chartqa_process_results

__all__ = ["chartqa_doc_to_text", "chartqa_process_results", "doc_to_visual"]


def doc_to_visual(doc):
    """The pictures of a row."""
    return [image.convert("RGB") for image in doc["images"]]
