"""tfrecord_tools/verify"""
