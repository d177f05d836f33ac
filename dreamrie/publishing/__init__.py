"""Publishing a run, whatever was trained: its model card, and the Hugging Face Hub."""
