# COCO boxes and masks at a single scale, (1333, 800); 2 images on each of 8 GPUs.
_base_ = "mmdet::_base_/datasets/coco_instance.py"
