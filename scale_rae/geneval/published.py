"""The files behind published GenEval scores: their names and hashes. Imports nothing."""

DETECTOR_FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
DETECTOR_SHA256 = "743b7d99015f1224c6d57fd4b14d04b15cc8ec72ae7ee7831e7c71d8873b7a54"
DETECTOR_ADDRESS = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
)
CONVERTED_FROM = "converted_from"  # of a converted folder's config.json: name and SHA-256 of the published file
CLIP = "openai/clip-vit-large-patch14"
