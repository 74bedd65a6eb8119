"""A trained backbone on PASCAL VOC: multi-label classification, object detection, semantic segmentation."""

from sela_ext.finetuning.run import FinetuneResult, finetune

__all__ = ["FinetuneResult", "finetune"]
