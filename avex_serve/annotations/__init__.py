"""Tables of detections in the formats of other programs: a module for each format, with one writer."""
