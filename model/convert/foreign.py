"""Layouts that courses, tutorials and other projects leave behind, whose nets none of ours can express."""

import re
from collections.abc import Mapping

from torch import Tensor

# A pattern of a name that such a file has, and what the net is.
FOREIGN = {
    r"first_stage_model\.": "a latent diffusion model: what its net makes, an autoencoder (first_stage_model) decodes",
    r"\.ds_conv\.weight": "The Annotated Diffusion Model's U-Net with ConvNeXt blocks, which none of our nets has",
    r"\.fn\.fn\.to_qkv\.weight": "the U-Net of The Annotated Diffusion Model, or of version 1 of "
    "denoising_diffusion_pytorch: group norms and linear attention, which none of our nets has together",
    r"image_proj\.weight": "labml.ai's DDPM U-Net, which enlarges by transposed convolutions and attends without norm",
    r"class_emb\.weight": "a net that reads the embedding of a label as channels beside the picture's, such as the "
    "ClassConditionedUnet of the Hugging Face course",
    r"sa1\.mha\.": "dome272's U-Net, with double convolutions, layer norms and max pooling",
    r"(contextembed1|timeembed1)\.model\.0\.weight": "the U-Net of Conditional_Diffusion_MNIST, which multiplies "
    "pictures by the embedding of a label",
    r"resnet_conv_first\.\d": "the U-Net of explainingai's DDPM-Pytorch, which enlarges by transposed convolutions",
    r"\.transformer_blocks\.": "a net that attends to a text, such as Stable Diffusion's",
    r"all_modules\.\d+\.(Conv|NIN|GroupNorm)_\d": "a net of score_sde_pytorch, whose modules are numbered",
    r"x_embedder\.proj\.weight": "a diffusion transformer (DiT)",
    r"(map_noise\.freqs|map_layer0\.weight)": "a net of EDM, which is preconditioned by the noise level",
    r"(quant_conv|encoder\.conv_in)\.": "an autoencoder, which makes latents of pictures",
    r"\.double_conv\.\d": "a U-Net without timesteps, as for segmentation",
}


def recognised(state: Mapping[str, Tensor]) -> str:
    """What a file is that holds tensors of these names, or ""."""
    return next((what for pattern, what in FOREIGN.items() if any(map(re.compile(pattern).search, state))), "")
