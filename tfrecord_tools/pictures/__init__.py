"""tfrecord_tools/pictures"""
