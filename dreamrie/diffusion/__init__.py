"""DreamBooth on Stable Diffusion: pictures, prior preservation, the model's parts, the task."""
