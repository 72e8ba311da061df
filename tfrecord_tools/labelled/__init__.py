"""tfrecord_tools/labelled"""
