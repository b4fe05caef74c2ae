"""The Helm chart, the image and what comes with them, by the genuine tools."""
