"""Detection: what the infected model itself tells about its training images."""
