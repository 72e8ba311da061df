"""tfrecord_tools/inspection"""
