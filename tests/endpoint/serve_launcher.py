"""Starts `transformers serve` where torchvision's compiled part cannot load, as beside a CPU build of torch.

Run by the interpreter named in PAGEREEL_SERVE_PYTHON, never imported by a test. Arguments go to `transformers`.
"""

import io
import sys

import numpy as np
import torch
from PIL import Image

if torch.version.cuda is None:
    # What torchvision declares in its compiled part, and asks for as soon as it is imported.
    SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision.io


def decode_image(data, mode=None, apply_exif_orientation=False):
    """Return a picture, (3, height, width) uint8, as torchvision's own compiled decoder does for PNG."""
    assert getattr(mode, "name", "RGB") == "RGB"
    with Image.open(io.BytesIO(bytes(data.numpy()))) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


torchvision.io.decode_image = torchvision.io.image.decode_image = decode_image

if __name__ == "__main__":
    from transformers.cli.transformers import main

    sys.argv[0] = "transformers"
    main()
