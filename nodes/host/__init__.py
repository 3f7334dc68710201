"""The one door to ComfyUI: only files in this folder import the host."""
