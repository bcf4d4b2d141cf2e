"""What teachers say of images, computed once: Arrow files keyed by content, memory-mapped. No server, no lock."""
