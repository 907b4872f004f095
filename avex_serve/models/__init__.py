"""The torch side: backbones, their front ends, and probes. Import paths are avex's."""
